"""Tests of the benchmarks: that they measure what they say, and notice what is wrong."""
