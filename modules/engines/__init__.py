"""Engines live here. They are imported only inside a child process (see worker.py), never by the page's process."""
