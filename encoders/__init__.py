"""Media encoders, one file each; `registry` finds them by module and architecture.

The package is `mimo_gemma4.encoders`. In a checkout, `encoders` is another name for it.
"""

if __name__ == "encoders":
    import importlib
    import pkgutil
    import sys

    for _file in pkgutil.iter_modules(__path__):
        sys.modules[f"encoders.{_file.name}"] = importlib.import_module(f"mimo_gemma4.encoders.{_file.name}")
    sys.modules["encoders"] = importlib.import_module("mimo_gemma4.encoders")
