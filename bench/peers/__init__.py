"""mtu-compile side by side with what people use now for the same pipeline on a CPU: ``python -m bench.peers``.

``contenders.py`` lists who takes part, with the settings their documentation recommends for a CPU; each of the other
files but ``worker``, ``race`` and ``page`` is one library: how it makes its files (``prepare``), opens them and makes a
picture. A contender runs in a process, and its library in an environment, of its own.
"""
