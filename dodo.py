"""doit's entry: the steps of tasks/ for the recipes that the command line asks for (see mlcbuild/graph/plan.py)."""

from pathlib import Path

from mlcbuild.graph.plan import load_tasks

globals().update(load_tasks(Path(__file__).resolve().parent))
