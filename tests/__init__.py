"""The test suite: one file a contract, cases shared with the benchmarks."""
