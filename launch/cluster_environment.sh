# Sourced by the job scripts: the environment of NCCL and of the libraries around it, on every node. The one place for
# it; docs/cluster.md gives the reason of each line. What is already set when a job is submitted wins.

# What a cluster's network needs is its own; uncomment after a look at `ip -brief address` and `ibv_devices`.
#export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib0}" # where NCCL's ranks find each other
#export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-ib0}" # the same for gloo
#export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"              # which adapters carry the data
#export OMPI_MCA_btl_tcp_if_include="${OMPI_MCA_btl_tcp_if_include:-ib0}" # the same for mpirun's ranks (prepare.sbatch)
#export PRTE_MCA_prte_if_include="${PRTE_MCA_prte_if_include:-ib0}"       # and for its helper on every node

export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$logs/collectives-of-rank-}"
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/megacog-triton-$(id -u)}"
