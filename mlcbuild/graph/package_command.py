"""doit's command `verify-package`: is this package whole, from whom it should be, and does it run here?

    doit verify-package artifacts/packages/tiny-q4f16_1-x86-64-v4 key=pub.pem

It needs no recipes and no store, so that it can be used wherever a package was copied to.
This module is imported by every doit command, so it imports nothing that takes time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from doit.cmd_base import Command
from doit.exceptions import InvalidCommand

from mlcbuild.graph.settings import end_with_reader

VARIABLES = ("key", "smoke")


class VerifyPackage(Command):
    """`doit verify-package PATH`: see quality/check.py."""

    name = "verify-package"
    doc_purpose = "check a package's files, signature and machine, and let it reply"
    doc_usage = "PATH [key=pub.pem] [smoke=0]"
    doc_description = (
        "Hashes every file, compares provenance.json with them, checks the signature with the ed25519 public key, asks "
        "whether this machine can run the package, and generates 16 tokens; smoke=0 leaves out the last two. "
        "Exit code: 0, 1 if something is wrong, 3 for a mistake on the command line."
    )

    @end_with_reader
    def execute(self, params: Any, args: list[str]) -> int:
        """0 if all is well, 1 if not."""
        from doit import doit_cmd

        from mlcbuild.errors import MlcbuildError
        from mlcbuild.graph.execute import is_mendable
        from mlcbuild.graph.settings import is_on
        from mlcbuild.quality.check import check_package
        from mlcbuild.recipes.names import check_name

        variables = dict(doit_cmd._CMDLINE_VARS or {})
        if len(args) != 1:
            raise InvalidCommand(
                f"doit verify-package takes one package, not {len(args)}\n"
                "  hint: doit verify-package artifacts/packages/... key=pub.pem"
            )
        try:
            for name in variables:
                check_name("variable", name, VARIABLES)
            smoke = is_on(variables.get("smoke", "1"))
            key = Path(variables["key"]) if "key" in variables else None
            for what, found in check_package(Path(args[0]), key, smoke=smoke):
                print(f"ok    {what:<10} {found}", flush=True)
        except ValueError:
            raise InvalidCommand(f"smoke={variables['smoke']} is neither 1 nor 0") from None
        except MlcbuildError as error:
            raise InvalidCommand(str(error)) from None
        except Exception as error:
            if not is_mendable(error):
                raise
            sys.stderr.write(f"fail  {error}\n")
            return 1
        return 0
