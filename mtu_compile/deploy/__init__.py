"""A bundle's way to boards: what a host does over SSH. The board's end of it is ``mtu_compile.board.agent``."""
