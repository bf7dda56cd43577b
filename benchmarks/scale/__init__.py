"""The cost model of docs/scale.md beside what it describes."""
