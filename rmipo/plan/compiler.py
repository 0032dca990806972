"""Whether Triton can compile here, which flex attention and the fused LM head need at a run's first step."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path


def compiler_problem() -> str | None:
    """Why the C compiler that Triton takes can't build an extension of this Python; None if it can."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler: install gcc or clang, or name one in CC"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n")  # its headers are a package of their own, python3-dev on Debian
        headers = f"-I{sysconfig.get_paths()['include']}"
        command = [compiler, "-shared", "-fPIC", headers, source, "-o", f"{folder}/a.so"]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            return f"{compiler} can't compile Python.h (in python3-dev on Debian): {reason.strip()[:200]}"
    return None
