"""Its being here puts this folder on the import path; the helpers have a module name of their own."""

from evaluation_cases import dataset, settings  # noqa: F401
