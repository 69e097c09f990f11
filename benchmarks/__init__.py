"""fastvae's benchmarks: what a VAE's latent side costs, beside what one would use instead.

`fastvae bench` runs them; see docs/benchmarking.md.  The package is `benchmarks` in a checkout and
`fastvae.benchmarks` where fastvae is installed, so it imports itself by relative names alone.
"""
