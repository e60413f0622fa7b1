"""The optional native library of the CPU kernels."""
def native_why_not(device_type: str) -> str | None:
    """Says why the native library cannot run on a device type, None if it can."""
    return 'the native library is not built'
