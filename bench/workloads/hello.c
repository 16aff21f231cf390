/* What fork_exec and fork_sh run: a static program that ends at once. */
int main(void)
{
    return 0;
}
