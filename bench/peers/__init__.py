"""mtu-compile side by side with what people use now for the same pipeline on a CPU: ``python -m bench.peers``.

``contenders.py`` lists who takes part, with the settings their documentation recommends for a CPU; each file in
``libraries`` knows one of theirs: how it makes its files (``prepare``), opens them and makes a picture. A contender
runs in a process, and its library in an environment, of its own.
"""
