"""Mixed precision by measurement: the fewest, cheapest layers that stay float so that a task keeps its accuracy.

1. Layers that the device runs slower in INT8 than in float stay float.
2. Each layer's error, when only it is INT8, is estimated on calibration inputs (``errors``), and layers are ranked by
   it and by the time that INT8 saves (``ranking``).
3. Errors add up, so the error of any choice is known without running it. As long as a UNet call misses the criteria,
   the layer whose INT8 does most of the damage for its gain in time becomes float; layers that turn out not to be
   needed are given back (``choosing``).
4. The choice is run as a whole (``evaluating``). If it misses the criteria after all, layers that do more than was
   estimated are looked for and measured (``judging``), and the search goes on with stricter criteria.

Tasks that share one network share the choice: a layer is judged in each of them, and each has to meet the criteria
(``choose_for_all``).

Float layers cost time. The search stops where the network would become slower than ``Criteria.slowdown`` allows, or
where stricter choices come no nearer to the criteria, and says so: whether a task is good enough is not decided here,
but by its thresholds.
"""

from calibration.mixed.choosing import choose, choose_for_all, to_blame
from calibration.mixed.effort import Effort, TaskInputs
from calibration.mixed.errors import LayerErrors, layer_errors
from calibration.mixed.evaluating import Criteria

__all__ = ["Criteria", "Effort", "LayerErrors", "TaskInputs", "choose", "choose_for_all", "layer_errors", "to_blame"]
