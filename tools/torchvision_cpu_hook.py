"""Let the registry's CUDA build of torchvision be imported beside a CPU-only torch.

That build registers fake kernels for two operators whose schemas its compiled library, which needs CUDA, would declare.
So they are declared just before torchvision's own code runs. There are no kernels: torchvision.ops.nms raises. For
development set-ups only; a matching pair of torch and torchvision needs nothing, and there nothing is installed.

    python tools/torchvision_cpu_hook.py --install    # into this interpreter, if its torch has no CUDA
"""

import shutil
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

_kept = []


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _declaring_first(spec.loader.exec_module)
        return spec


def _declaring_first(run):
    def exec_module(module):
        import torch

        if torch.version.cuda is None and not _kept:
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)
        return run(module)

    return exec_module


def install():
    import torch

    if torch.version.cuda is None:
        site = Path(sysconfig.get_path("purelib"))
        shutil.copy(__file__, site / "_torchvision_cpu_hook.py")
        (site / "_torchvision_cpu_hook.pth").write_text("import _torchvision_cpu_hook\n")


if __name__ == "__main__" and sys.argv[1:] == ["--install"]:
    install()
else:
    sys.meta_path.insert(0, _Finder)
