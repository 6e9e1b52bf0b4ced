"""Where steps are run that have to be: in this process, in processes of their own, on a cluster."""

from mtu_compile.steps.executors.base import Executor
from mtu_compile.steps.executors.in_process import InThisProcess
from mtu_compile.steps.executors.named import check_executor, executor_for

__all__ = ["Executor", "InThisProcess", "check_executor", "executor_for"]
