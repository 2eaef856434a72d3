"""
Transformers' own test suites, importable: `from tests.upstream.test_modeling_common import ModelTesterMixin`.

The suites come from the source distribution of the installed Transformers (Apache-2.0), fetched once into the cache of
`benchmarks.sources`. It leaves out some modules that they import; those lie here, as small as the suites allow.

Raises:
    SourceUnavailable: on import, if the source distribution cannot be fetched.
"""

from benchmarks import sources

__path__.append(str(sources.transformers_tests()))
