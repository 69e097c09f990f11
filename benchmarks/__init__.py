"""What a VAE's latent side costs with fastvae, and with what one would use instead: measuring alone.

`fastvae bench` runs the suites, `python -m fastvae.benchmarks.studies` a few experiments of their own.  The package
imports the library and nothing of `fastvae.app`.

The package has one name, `fastvae.benchmarks`: where it is installed, because a wheel should not own a top-level name
like `benchmarks`, and in a checkout, by the link `fastvae/benchmarks`.  With two names there would be two copies of it
in a process, and a change of one would not be seen by the other.
"""

if __name__ != "fastvae.benchmarks":
    raise ImportError(f"import the benchmarks as fastvae.benchmarks, not as {__name__}")
