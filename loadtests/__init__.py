"""Load tests: open-loop HTTP load on running servers, arms in interleaved blocks, a report.

The package knows servers by their HTTP interface alone and imports neither `molex` nor `server`.
"""
