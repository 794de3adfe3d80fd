"""Templates from images: a registry on a port of its own, archives, Dockerfiles by the command line."""

import pathlib
import subprocess

import pytest
from registry import Registry, tar_of, write_layout
from server import free_port

LIBRARIES = ("/lib64/ld-linux-x86-64.so.2",)


def small_system():
    """bash and its libraries as they are on this machine, busybox for everything else."""
    listed = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True, check=True).stdout
    libraries = {word for line in listed.splitlines() for word in line.split() if word.startswith("/")} | set(LIBRARIES)
    files = {"bin/bash": "/bin/bash", "bin/busybox": "/bin/busybox", **{path.lstrip("/"): path for path in libraries}}
    applets = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    folders = sorted({str(parent) for path in files for parent in pathlib.PurePath(path).parents if str(parent) != "."})
    return tar_of(
        *((folder, None, 0o755) for folder in [*folders, "etc", "root", "srv", "usr", "usr/bin"]),
        ("tmp", None, 0o1777),
        *((path, pathlib.Path(source).read_bytes(), 0o755) for path, source in files.items()),
        *((f"bin/{applet}", "-> busybox", 0o777) for applet in applets if applet not in ("busybox", "bash")),
        ("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n", 0o644),
        ("etc/group", "root:x:0:\n", 0o644),
        ("srv/kept", "kept", 0o644),
        ("srv/gone", "gone", 0o644),
    )


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image") / "layout"
    write_layout(folder, [small_system(), tar_of(("srv/.wh.gone", "", 0o644), ("srv/new", "new", 0o644))])
    return folder


@pytest.fixture(scope="module")
def registry(layout, tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("registry"), layout)
    yield registry.host
    registry.stop()


@pytest.fixture
def locked_registry(layout, tmp_path):
    # bcrypt of "open sesame"
    auth = "me:$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW\n"
    registry = Registry(tmp_path, layout, auth, ["--dest-creds", "me:open sesame"])
    yield registry.host
    registry.stop()


def run_in(template, command):
    from e2b import Sandbox

    sandbox = Sandbox.create(template, timeout=60)
    try:
        return sandbox.commands.run(command).stdout
    finally:
        sandbox.kill()


def test_a_template_stands_on_an_image_of_a_registry(server, registry):
    from e2b import Template

    lines = []
    recipe = Template().from_image(f"{registry}/team/small:v1").run_cmd("cat /srv/kept /srv/new > /tmp/made && ls /srv >> /tmp/made")
    Template.build(recipe, "on-image", cpu_count=1, memory_mb=512, on_build_logs=lambda entry: lines.append(str(entry)))
    assert any("Pulling" in line for line in lines), lines
    assert run_in("on-image", "cat /tmp/made; echo $GREETING") == "keptnewkept\nnew\nhello from the image\n"


def test_an_image_that_cannot_be_had_is_named_with_its_registry_and_the_way_out(server, registry):
    from e2b import Template
    from e2b.exceptions import BuildException

    nobody = f"127.0.0.1:{free_port()}"
    images_and_words = [
        (f"{registry}/team/none:v1", ["has no image", "team/none:v1"]),
        (f"{nobody}/team/small:v1", [nobody, "cannot be reached", "template.image_aliases"]),
    ]
    for image, words in images_and_words:
        with pytest.raises(BuildException) as failure:
            Template.build(Template().from_image(image), "without-image")
        for word in words:
            assert word in str(failure.value), failure.value


def test_a_locked_registry_opens_to_the_builds_credentials(server, locked_registry):
    from e2b import Template
    from e2b.exceptions import BuildException

    image = f"{locked_registry}/team/small:v1"
    with pytest.raises(BuildException, match="does not give image"):
        Template.build(Template().from_image(image), "locked")
    Template.build(Template().from_image(image, username="me", password="open sesame"), "locked")
    assert run_in("locked", "cat /srv/new") == "new"


def test_e2bs_base_image_is_the_base_template(server):
    from e2b import Template

    Template.build(Template().from_base_image().run_cmd("python3 --version > /tmp/made"), "on-base-image")
    assert run_in("on-base-image", "cat /tmp/made").startswith("Python 3.")


def test_a_dockerfile_is_built_by_the_command_line(server, registry, tmp_path):
    folder = tmp_path / "app"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "main.sh").write_text("echo from the context\n")
    (folder / "src" / "left.log").write_text("left out")
    (folder / ".dockerignore").write_text("**/*.log\n")
    dockerfile = folder / "Dockerfile"
    lines = [f"FROM {registry}/team/small:v1", "ENV NAME=value", "WORKDIR /app", "COPY src/ ./", "RUN ls > /listed && echo $NAME", "EXPOSE 80"]
    dockerfile.write_text("\n".join(lines) + "\n")
    first = server.cli("template", "build", str(folder), "--name", "by-cli", "--memory-mb", "512")
    assert "line 6: EXPOSE means nothing here" in first.stderr
    assert "RUN ls > /listed" in first.stdout and "   value" in first.stdout, first.stdout
    assert run_in("by-cli", "cat /listed; bash /app/main.sh") == "main.sh\nfrom the context\n"
    again = server.cli("template", "build", str(folder), "--name", "by-cli", "--memory-mb", "512")
    assert "CACHED" in again.stdout, again.stdout
    assert "RUN ls > /listed" in server.cli("template", "logs", "by-cli").stdout
    dockerfile.write_text("\n".join([*lines[:4], "RUN echo told && exit 3"]) + "\n")
    failed = server.cli("template", "build", str(folder), "--name", "failing", check=False)
    assert failed.returncode == 1 and "exit status 3" in failed.stderr and "   told" in failed.stdout, failed
    dockerfile.write_text("FROM a\nFROM b\n")
    refused = server.cli("template", "build", str(folder), check=False)
    assert refused.returncode == 1 and "Dockerfile line 2: a second FROM" in refused.stderr, refused.stderr


def test_templates_travel_and_what_nothing_needs_is_removed(server, layout, tmp_path):
    archive = tmp_path / "small.tar"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:team/small:v1", f"docker-archive:{archive}:team/imported:v1"], check=True)
    server.cli("template", "import", str(archive), "--name", "imported")
    assert run_in("imported", "cat /srv/new") == "new"
    exported = tmp_path / "exported.tar.zst"
    server.cli("template", "export", "imported", str(exported))
    server.cli("template", "rm", "imported")
    assert "imported" not in server.cli("template", "ls").stdout
    server.cli("template", "import", str(exported), "--name", "back")
    assert run_in("back", "cat /srv/new") == "new"
    server.cli("template", "rm", "back")
    for others in ("on-image", "locked", "by-cli"):
        server.cli("template", "rm", others, check=False)  # of tests that may have run on another worker's server
    layers = server.data_dir / "layers"
    before = len(list(layers.iterdir()))
    server.cli("gc")
    after = len(list(layers.iterdir()))
    assert after < before, (before, after)
    assert run_in("base", "echo still here") == "still here\n"
