"""What the subcommands that compute do first."""


def start_jax() -> None:
    """Keep freed memory and compiled programs; before the threads that importing jax starts."""
    from soup_jax.hardware import host_memory

    host_memory.keep_freed()
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
