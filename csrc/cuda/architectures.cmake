# What the kernels are built for unless somebody names architectures: the cards of this machine, or, without a card or
# for wheels that others will install (AFA_CUDA_ARCHITECTURES=all), every card: machine code for each generation, which
# later cards of the same major version run too, and PTX of the last one for cards that do not exist yet. A driver
# translates PTX only up to its own CUDA; machine code it runs as it is.
set(AFA_OLDEST_NVCC 12.0)
function(afa_all_architectures nvcc result)
    if(nvcc VERSION_LESS 12.8)
        message(STATUS "afa_kernels: nvcc ${nvcc} does not know sm_100 and sm_120, whose cards will run the PTX of sm_90; "
                       "nvcc 12.8 and later build code for them")
        set(${result} "80-real;90" PARENT_SCOPE)
    else()
        set(${result} "80-real;90-real;100-real;120" PARENT_SCOPE)
    endif()
endfunction()

# The cards of this machine, where its nvcc knows all of them; else nothing.
function(afa_present_architectures compiler result)
    set(${result} "" PARENT_SCOPE)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE capabilities RESULT_VARIABLE failed ERROR_QUIET)
    if(failed)
        return()
    endif()
    execute_process(COMMAND ${compiler} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
    list(REMOVE_DUPLICATES capabilities)
    set(found "")
    foreach(capability IN LISTS capabilities)
        string(REPLACE "." "" number ${capability})
        if(capability VERSION_LESS 8.0)
            continue()  # the kernels do not run there
        elseif(NOT known MATCHES "sm_${number}[^0-9]")
            return()
        endif()
        list(APPEND found ${number}-real)
    endforeach()
    set(${result} "${found}" PARENT_SCOPE)
endfunction()
