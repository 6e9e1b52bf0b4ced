"""``mtu-compile serve``: a bundle behind OpenAI's Images API, on the board: numpy, no torch.

A request's way: ``guard`` (host, origin, token) → ``bodies`` (size, time, JSON or form) → ``wishes`` (what may be
asked) → ``service`` (held against the bundle) → ``waiting`` (the bounded queue) → ``worker`` (the one thread that runs
the engines) → ``answers`` (JSON, or server-sent events).
"""
