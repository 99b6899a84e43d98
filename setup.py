"""Builds the C extension; everything else is in pyproject.toml."""

from multiprocessing.pool import ThreadPool

from setuptools import setup
from setuptools.command.build_ext import build_ext


class ParallelBuild(build_ext):
    """Compiles several files at once."""

    def build_extensions(self):
        compile_all = self.compiler.compile

        def compile_each(sources, **options):
            with ThreadPool() as pool:
                objects = pool.map(lambda source: compile_all([source], **options), sources, 1)
            return [name for names in objects for name in names]

        self.compiler.compile = compile_each
        super().build_extensions()


setup(
    cmdclass={"build_ext": ParallelBuild},
    cffi_modules=["tools/build_native.py:builder"],
    # cffi builds for the limited API: one wheel serves every Python from the oldest one on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
