package main

import (
	"fmt"
	"net/url"
	"strings"
	"text/tabwriter"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"tidemark/proxy/admin"
)

func newExposure() *cobra.Command {
	c := &cobra.Command{
		Use:   "exposure DIGEST",
		Short: "Show who resolved or fetched a digest",
		Long: `Show which clients were told that a tag means this digest (resolves), and which
got its manifest (fetches), first and last. What is shown is kept for
audit.exposure_keep, and is never part of the log.`,
		Example: "  tidemark exposure sha256:2588a44890263a81…",
		Args:    cobra.ExactArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if _, err := digest.Parse(args[0]); err != nil {
			return usage(fmt.Errorf("%q is not a digest: %w", args[0], err))
		}
		var x admin.Exposure
		if err := cl.getJSON(c.Context(), "/api/v1/exposure", url.Values{"digest": {args[0]}}, &x); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, x)
		}
		if x.Total == 0 {
			fmt.Fprintln(c.OutOrStdout(), "nobody, as far as it is kept")
			return nil
		}
		w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "CLIENT\tUSER\tFIRST\tLAST\tRESOLVES\tFETCHES\tREFS")
		for _, cl := range x.Clients {
			user := cl.User
			if user == "" {
				user = "-"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%s\n", cl.Client, user, stamp(cl.First), stamp(cl.Last), cl.Resolves, cl.Fetches, strings.Join(cl.Refs, " "))
		}
		return w.Flush()
	}
	return c
}
