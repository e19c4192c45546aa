"""For all tests: threads that wait leave their cores to others, as in the pipeline's processes.

OpenMP reads it when torch is imported. A thread that spins where another program wants its core
makes what is computed in small steps twenty times as slow.
"""

import pipeline  # noqa: F401
