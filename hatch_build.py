"""Build hook: generates the gRPC stubs from protos/ whenever the package is built or installed.

The stubs (`frostgate.v1.*_pb2`, `*_pb2_grpc`, and their type stubs) go to build/stubs, which an editable
install puts on the path and a wheel includes. They are never committed.
"""

import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

STUBS = Path("build/stubs")


class StubsBuildHook(BuildHookInterface[Any]):
    """Runs protoc before the wheel's files are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the stubs; hatchling calls it for `standard` and `editable` wheels alike."""
        generate(Path(self.root))
        if self.target_name == "wheel" and version != "editable":
            build_data["force_include"][str(Path(self.root) / STUBS / "frostgate")] = "frostgate"


def generate(root: Path) -> None:
    """Generate the stubs of every protos/**/*.proto below build/stubs.

    Raises RuntimeError when protoc refuses a file (it prints why).
    """
    from grpc_tools import protoc

    protos = root / "protos"
    stubs = root / STUBS
    shutil.rmtree(stubs, ignore_errors=True)
    stubs.mkdir(parents=True)
    files = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    plugins = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"--proto_path={protos}",
        f"--proto_path={resources.files('grpc_tools') / '_proto'}",
        f"--python_out={stubs}",
        f"--grpc_python_out={stubs}",
    ]
    if (plugins / "protoc-gen-mypy").exists():
        arguments += [
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--mypy_out={stubs}",
            f"--mypy_grpc_out={stubs}",
        ]
    if protoc.main([*arguments, *files]) != 0:
        raise RuntimeError("protoc failed; see its message above")
    for package in (stubs / "frostgate", stubs / "frostgate" / "v1"):
        (package / "__init__.py").write_text('"""Generated from protos/ by hatch_build.py; do not edit."""\n')
        (package / "py.typed").touch()


if __name__ == "__main__":
    generate(Path(__file__).parent)
