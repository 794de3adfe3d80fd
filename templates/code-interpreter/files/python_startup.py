"""Run by every Python kernel before its first cell: formats that E2B's SDKs know, and what makes it a sandbox's own."""


def _stillbox_formats():
    import sys

    import IPython
    from IPython.core.formatters import BaseFormatter, JSONFormatter
    from traitlets import ObjectName, Unicode

    class DataFormatter(BaseFormatter):
        """A pandas frame as {column: [values]}."""

        format_type = Unicode("e2b/data")
        print_method = ObjectName("_repr_e2b_data_")
        _return_type = (dict, str)

        def __call__(self, value):
            # Nobody has a frame who has not imported pandas, and importing it here would cost every cell its time.
            pandas = sys.modules.get("pandas")
            if pandas is None or not isinstance(value, getattr(pandas, "DataFrame", ())):
                return super().__call__(value)
            columns = value.to_dict(orient="list")
            return {name: [plain(cell, pandas) for cell in cells] for name, cells in columns.items()}

    def plain(cell, pandas):
        return cell.isoformat() if isinstance(cell, pandas.Timestamp) else cell

    class ChartFormatter(BaseFormatter):
        """A matplotlib figure as the data that was drawn."""

        format_type = Unicode("e2b/chart")
        print_method = ObjectName("_repr_e2b_chart_")
        _return_type = (dict, str)

        def __call__(self, value):
            figure = sys.modules.get("matplotlib.figure")
            if figure is None or not isinstance(value, figure.Figure):
                return super().__call__(value)
            try:
                from e2b_charts import chart_figure_to_dict

                return chart_figure_to_dict(value)
            except Exception:  # a figure that it cannot read is still shown as an image
                return {}

    class ListFormatter(JSONFormatter):
        """Lists and dicts as JSON, where they can be."""

        def __call__(self, value):
            if isinstance(value, (list, dict)):
                import orjson

                try:
                    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
                    return orjson.loads(text), {"expanded": True}
                except TypeError:
                    pass
            return super().__call__(value)

    display_formatter = IPython.get_ipython().display_formatter
    for formatter in (DataFormatter, ChartFormatter, ListFormatter):
        made = formatter(parent=display_formatter)
        display_formatter.formatters[made.format_type] = made


def _stillbox_images():
    """Images of PIL are shown where `show` would open a window, and when they are saved under a name."""
    from IPython.display import display
    from PIL import Image, ImageShow

    ImageShow.UnixViewer.show_file = lambda self, path, **options: 0
    save = Image.Image.save

    def show(image, title=None):
        display(image)

    def save_and_show(image, fp, format=None, **params):
        if isinstance(fp, str):
            display(image)
        save(image, fp, format, **params)

    Image.Image.show = show
    Image.Image.save = save_and_show


def _stillbox_identity():
    """The agent sends SIGURG when the sandbox has become another one (created from a dump, forked), even in the middle
    of a cell: the variables are then the new sandbox's, and every generator starts again from the kernel's randomness.
    A resumed sandbox is the same one and is sent nothing: what it seeded stays seeded. Variables that change at run time
    come the same way, without new randomness."""
    import json
    import os
    import signal
    import sys

    from ipykernel.kernelapp import IPKernelApp

    folder = os.path.dirname(IPKernelApp.instance().abs_connection_file)
    reseeds = 0

    def become_another(number=None, frame=None):
        nonlocal reseeds
        try:
            with open(os.path.join(folder, "identity.json")) as file:
                change = json.load(file)
        except (OSError, ValueError):
            change = {}
        os.environ.update(change.get("set", {}))
        for name in change.get("unset", ()):
            os.environ.pop(name, None)
        if change.get("reseeds", 0) != reseeds:
            reseeds = change["reseeds"]
            reseed(sys.modules)

    def reseed(modules):
        if "random" in modules:
            modules["random"].seed(os.urandom(32))
        if "numpy.random" in modules:
            modules["numpy.random"].seed(list(os.urandom(64)))
        if "ssl" in modules:
            # OpenSSL's generator notices a fork but no restore; what is added makes it start anew.
            modules["ssl"].RAND_add(os.urandom(32), 32.0)
        if "tempfile" in modules:
            modules["tempfile"]._name_sequence = None
        if "torch" in modules:
            modules["torch"].seed()

    signal.signal(signal.SIGURG, become_another)


_stillbox_formats()
_stillbox_images()
_stillbox_identity()
del _stillbox_formats, _stillbox_images, _stillbox_identity
