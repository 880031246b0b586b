import sys
from pathlib import Path

# The room's helpers (fakes, small, reference) are imported by name; tests/ is no package.
sys.path.insert(0, str(Path(__file__).parent))
