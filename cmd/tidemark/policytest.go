package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tidemark/proxy/admin"
)

func newPolicy() *cobra.Command {
	c := &cobra.Command{
		Use:     "policy",
		Short:   "Try out policies",
		Example: "  tidemark policy test -c new.yaml --since 90d",
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newPolicyTest())
	return c
}

func newPolicyTest() *cobra.Command {
	var path, sinceFlag string
	c := &cobra.Command{
		Use:   "test",
		Short: "Replay recorded history against a policy: what it would have held, and for how long",
		Long: `Replay what the ledger has recorded against the policy of a configuration, or
against the one that decides now: which digests it would have kept from being
served, by which rule, and for how long. Nothing is changed.`,
		Example: `  tidemark policy test -c new.yaml
  tidemark policy test -c new.yaml --since 90d --json`,
		Args: cobra.NoArgs,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVarP(&path, "config", "c", "", "configuration file whose policy is tried; default: the server's present one")
	c.Flags().StringVar(&sinceFlag, "since", "", "only what would have been held in this time, such as 90d, or since this date")
	c.RunE = func(c *cobra.Command, _ []string) error {
		var in admin.PolicyTest
		if path != "" {
			text, err := os.ReadFile(path)
			if err != nil {
				return usage(err)
			}
			if _, err := parsePolicy(string(text)); err != nil { // with lines and excerpts, before anybody is asked
				return usage(fmt.Errorf("configuration %s:\n%w", path, err))
			}
			in.Config = string(text)
		}
		now := time.Now()
		if sinceFlag != "" {
			text, err := ago(sinceFlag, now)
			if err != nil {
				return err
			}
			since, err := time.Parse(time.RFC3339, text)
			if err != nil {
				return usage(err)
			}
			in.Since = &since
		}
		var out admin.PolicyResult
		if err := cl.postJSON(c.Context(), "/api/v1/policy/test", in, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		if len(out.Held) == 0 {
			fmt.Fprintln(c.OutOrStdout(), "nothing would have been held")
			return nil
		}
		w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "REF\tDIGEST\tMODE\tSINCE\tFOR\tRULE\tEVENT")
		for _, h := range out.Held {
			until, still := now, "still"
			if h.Until != nil {
				until, still = *h.Until, ""
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%v %s\t%s\t%d\n", h.Ref, short(h.Digest), h.Mode, stamp(h.Since), until.Sub(h.Since).Round(time.Second), still, h.Rule, h.Index)
		}
		if err := w.Flush(); err != nil {
			return err
		}
		for _, mode := range slices.Sorted(maps.Keys(out.Counts)) {
			fmt.Fprintf(c.OutOrStdout(), "%s: %d\n", mode, out.Counts[mode])
		}
		return nil
	}
	return c
}
