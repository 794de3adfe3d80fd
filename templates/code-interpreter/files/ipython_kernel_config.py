# For every IPython kernel of the sandbox, whoever starts it.
c = get_config()  # noqa: F821

# Tracebacks are read by programs.
c.InteractiveShell.colors = "NoColor"
# All of a long list is shown: it may be the answer.
c.PlainTextFormatter.max_seq_length = 0
# Its thread keeps an SQLite file open, which a fork of the sandbox would find changed.
c.HistoryManager.enabled = False
c.InteractiveShellApp.exec_files = ["/usr/share/stillbox/interpreter/python_startup.py"]
