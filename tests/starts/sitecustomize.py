"""Run by each interpreter that a test starts: without looking for garbage, imports take two thirds of their time."""

import gc

gc.disable()
