import sys
from pathlib import Path

# tests share the small configurations of test_experiments.py
sys.path.insert(0, str(Path(__file__).parent))
