//! The command line that ostree-ext ships as a library: turns a tree into a container image and deploys it.

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(ostree_ext::cli::run_from_iter(std::env::args_os()))
}
