# The architectures that the kernels are built for unless somebody asks for others: machine code for each generation, which
# later cards of the same major version run too, and PTX of the last one for cards that do not exist yet. A driver
# translates PTX only up to its own CUDA; machine code it runs as it is.
set(AFA_OLDEST_NVCC 12.0)
function(afa_cuda_architectures nvcc result)
    if(nvcc VERSION_LESS 12.8)
        message(STATUS "afa_kernels: nvcc ${nvcc} does not know sm_100 and sm_120, whose cards will run the PTX of sm_90; "
                       "nvcc 12.8 and later build code for them")
        set(${result} "80-real;90" PARENT_SCOPE)
    else()
        set(${result} "80-real;90-real;100-real;120" PARENT_SCOPE)
    endif()
endfunction()
