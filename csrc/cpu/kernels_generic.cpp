#define AFA_ISA generic
#define AFA_ISA_LEVEL 0
#include "cpu/isa/table.h"
