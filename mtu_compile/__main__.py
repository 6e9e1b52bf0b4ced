"""``python -m mtu_compile``."""

from mtu_compile.cli import main

if __name__ == "__main__":
    main()
