/* Where a guest's address leads to: page_walk.py. */

/* The machine address of the frame behind a canonical address if all entries have the bits of `needed`, and the last
   those of `needed_of_leaf`; 0: there is none. */
static u64 walk(const u8 *memory, u64 memory_size, u64 l4, u64 va, u64 needed, u64 needed_of_leaf)
{
    u64 table = l4 & PTE_ADDRESS, entry = 0;
    for (int shift = 39; shift >= 12; shift -= 9) {
        if (table >= memory_size)
            return 0;
        entry = ((const volatile u64 *)(memory + table))[va >> shift & 511];
        if ((entry & needed) != needed || (shift != 12 && shift != 39 && entry & PTE_PSE))
            return 0;
        table = entry & PTE_ADDRESS;
    }
    return table < memory_size && (entry & needed_of_leaf) == needed_of_leaf ? table : 0;
}
