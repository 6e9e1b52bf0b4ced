"""A graph pass of one's own: GELU by its tanh form, which some devices compute faster than the Erf form.

    mtu-compile build --pass examples/passes/tanh_gelu.py:tanh_gelu

Hendrycks and Gimpel give both forms ("Gaussian Error Linear Units", arXiv:1606.08415); the two differ by at most 4.7e-4
for a single value. What is left of that at the output of a UNet depends on its weights: the build measures it.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from passes import mtu_pass


@mtu_pass(tolerance=2e-3)
def tanh_gelu(graph: gs.Graph) -> None:
    """Gelu(x) → Gelu(x, approximate="tanh")."""
    for node in graph.nodes:
        if node.op == "Gelu" and node.attrs.get("approximate", "none") == "none":
            node.attrs["approximate"] = "tanh"
