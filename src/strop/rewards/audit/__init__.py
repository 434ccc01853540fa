"""The reward audit: probes of a run's real reward stack, each finding with the completion that shows it.

`bench` scores made-up completions through the run's own pool; the families of probes are one module each; `run` puts
them together. docs/audit.md describes every probe.
"""
