package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"tidemark/config"
	"tidemark/proxy/admin"
)

func newCache() *cobra.Command {
	c := &cobra.Command{
		Use:     "cache",
		Short:   "Look into the cache, and say what it keeps",
		Example: "  tidemark cache stat",
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newCacheStat(), newCacheLs(), newCachePin(), newCacheUnpin(), newCacheRm(), newCacheScrub())
	return c
}

func newCacheStat() *cobra.Command {
	c := &cobra.Command{
		Use:     "stat",
		Short:   "Show how full the cache is, and what it saved",
		Example: "  tidemark cache stat --json",
		Args:    cobra.NoArgs,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		var s admin.Status
		if err := cl.getJSON(c.Context(), "/api/v1/status", nil, &s); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, s.Cache)
		}
		w := c.OutOrStdout()
		fmt.Fprintf(w, "stored     %s in %d blobs\n", human(s.Cache.Bytes), s.Cache.Blobs)
		fmt.Fprintf(w, "budget     %s, %.1f %% used\n", human(s.Cache.Budget), 100*float64(s.Cache.Bytes)/float64(max(1, s.Cache.Budget)))
		fmt.Fprintf(w, "hit ratio  %.1f %% since %s\n", 100*s.Cache.HitRatio, stamp(s.Started))
		fmt.Fprintf(w, "saved      %s not fetched from upstreams\n", human(s.Cache.SavedBytes))
		for _, f := range s.Fills {
			fmt.Fprintf(w, "filling    %s  %s of %s, %d readers\n", short(f.Digest), human(f.Have), human(f.Size), f.Readers)
		}
		if !s.Cache.Indexed {
			fmt.Fprintln(w, "the index is still being built; the figures grow")
		}
		return nil
	}
	return c
}

// human is a number of bytes to three digits.
func human(n int64) string {
	if n < 0 {
		return "?"
	}
	v, unit := float64(n), 0
	for v >= 1024 && unit < 4 {
		v, unit = v/1024, unit+1
	}
	if unit == 0 {
		return config.Size{Bytes: n}.String() + " B"
	}
	return fmt.Sprintf("%.3g %s", v, [...]string{"", "KiB", "MiB", "GiB", "TiB"}[unit])
}
