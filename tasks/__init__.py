"""The steps and commands of mlcbuild, one file each; the file name is the registry (see mlcbuild/graph/plan.py)."""
