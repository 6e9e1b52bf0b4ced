"""What a board does with a bundle: build the engines that only it can build, and check them. No torch, no compiler."""

from mtu_compile.board.build import BoardBuildResult, build_bundle
from mtu_compile.board.check import check_bundle
from mtu_compile.board.machine import Board, probe

__all__ = ["Board", "BoardBuildResult", "build_bundle", "check_bundle", "probe"]
