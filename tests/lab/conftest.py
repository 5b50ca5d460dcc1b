import sys
from pathlib import Path

# the engine's jobs run in other processes, which import the synthetic experiment by name
sys.path.insert(0, str(Path(__file__).parent))
