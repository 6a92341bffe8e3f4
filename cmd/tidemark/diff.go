package main

import (
	"fmt"
	"io"
	"net/url"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"tidemark/audit"
	"tidemark/audit/diff"
	"tidemark/proxy/admin"
)

func newDiff() *cobra.Command {
	var platform string
	c := &cobra.Command{
		Use:   "diff REF | diff OLD NEW",
		Short: "Show what changed when a tag moved, or between two digests",
		Long: `Show what changed: platforms, layers with their sizes, configuration and labels.

With REF, from what is served to what is held back or, if nothing is, by the last
move of the tag. What is not here any more is asked for upstream; what nobody has
is told as such. Values of variables that look like secrets are masked.`,
		Example: `  tidemark diff nginx:latest
  tidemark diff sha256:b74b… sha256:4a5d… --platform linux/amd64`,
		Args: cobra.RangeArgs(1, 2), DisableFlagsInUseLine: true,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVar(&platform, "platform", "", "only this platform, such as linux/arm64")
	c.RunE = func(c *cobra.Command, args []string) error {
		q := url.Values{}
		if platform != "" {
			q.Set("platform", platform)
		}
		if len(args) == 2 && args[0] == args[1] {
			return usage(fmt.Errorf("%s and %s are the same digest: nothing can differ", args[0], args[1]))
		}
		if len(args) == 2 {
			for i, key := range []string{"old", "new"} {
				if _, err := digest.Parse(args[i]); err != nil {
					return usage(fmt.Errorf("%q is not a digest: %w", args[i], err))
				}
				q.Set(key, args[i])
			}
		} else if err := cl.lastMove(c, args[0], q); err != nil {
			return err
		}
		var d diff.Diff
		if err := cl.getJSON(c.Context(), "/api/v1/diff", q, &d); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, d)
		}
		printDiff(c.OutOrStdout(), &d)
		return nil
	}
	return c
}

// lastMove puts into q what a tag moved from and to: what is held back, or else
// what it meant before.
func (cl *client) lastMove(c *cobra.Command, arg string, q url.Values) error {
	ref, err := expandRef(arg)
	if err != nil {
		return err
	}
	q.Set("ref", ref.String())
	var list admin.TagList
	if err := cl.getJSON(c.Context(), "/api/v1/tags", url.Values{"match": {ref.String()}}, &list); err != nil {
		return err
	}
	if len(list.Tags) == 0 {
		return &audit.NeverSeenError{Ref: ref}
	}
	if t := list.Tags[0]; t.Head != t.Served && t.Served != "" {
		q.Set("old", t.Served.String())
		q.Set("new", t.Head.String())
		return nil
	}
	var past admin.History
	if err := cl.getJSON(c.Context(), "/api/v1/tags/history", url.Values{"ref": {ref.String()}, "limit": {"2"}}, &past); err != nil {
		return err
	}
	if len(past.History) < 2 {
		return fmt.Errorf("%s has not moved since it was first seen: there is nothing to compare", ref)
	}
	q.Set("old", past.History[1].Digest.String())
	q.Set("new", past.History[0].Digest.String())
	return nil
}

// printDiff writes a diff for reading: from the outside in, what is gone before
// what came.
func printDiff(w io.Writer, d *diff.Diff) {
	fmt.Fprintf(w, "old  %s  %s\nnew  %s  %s\n", d.Old.Digest, printable(d.Old.MediaType), d.New.Digest, printable(d.New.MediaType))
	if d.Class != "" {
		fmt.Fprintf(w, "looks like  %s\n", strings.ReplaceAll(d.Class, "_", " "))
	}
	if len(d.Signals) > 0 {
		fmt.Fprintf(w, "look at     %s\n", strings.Join(d.Signals, ", "))
	}
	for _, p := range d.Platforms.Removed {
		fmt.Fprintf(w, "- platform %s\n", name(p))
	}
	for _, p := range d.Platforms.Added {
		fmt.Fprintf(w, "+ platform %s\n", name(p))
	}
	if n := len(d.Platforms.Unchanged); n > 0 {
		fmt.Fprintf(w, "unchanged   %s\n", printable(strings.Join(d.Platforms.Unchanged, ", ")))
	}
	if a := d.Attestations; a.Old+a.New > 0 {
		fmt.Fprintf(w, "attestations  %d, were %d, %d new\n", a.New, a.Old, a.Changed)
	}
	for _, p := range d.Changed {
		printPlatform(w, p)
	}
	for _, u := range d.Unreadable {
		fmt.Fprintf(w, "\nnot to be had: %s; what it says is not compared\n", u)
	}
}

func name(platform string) string {
	if platform == "" {
		return "(not told)"
	}
	return printable(platform)
}

func printPlatform(w io.Writer, p diff.PlatformDiff) {
	if p.Platform != "" {
		fmt.Fprintf(w, "\n%s\n", name(p.Platform))
	} else {
		fmt.Fprintln(w)
	}
	if l := p.Layers; l != nil {
		fmt.Fprintf(w, "  layers   %d shared, %d gone, %d new: %s to fetch, image %s\n", len(l.Shared), len(l.Removed), len(l.Added), human(l.Bytes), delta(l.BytesDelta))
		if l.FirstDiffers == 0 && len(l.Shared) == 0 {
			fmt.Fprintln(w, "           nothing is shared, the base is another")
		}
		for _, x := range l.Removed {
			fmt.Fprintf(w, "  - %2d  %s  %s\n", x.Index, x.Digest, human(x.Size))
		}
		for _, x := range l.Added {
			fmt.Fprintf(w, "  + %2d  %s  %s\n", x.Index, x.Digest, human(x.Size))
		}
		if l.Reordered {
			fmt.Fprintln(w, "           shared layers stand in another order")
		}
	}
	cfg := p.Config
	switch {
	case cfg == nil:
		return
	case !cfg.Changed:
		fmt.Fprintln(w, "  config   the same")
		return
	case len(cfg.Fields)+len(cfg.Labels) == 0:
		fmt.Fprintln(w, "  config   another, with the same settings and labels")
	default:
		fmt.Fprintln(w, "  config")
	}
	for _, f := range cfg.Fields {
		printChange(w, strings.TrimSpace(f.Field+" "+f.Key), f)
	}
	for _, f := range cfg.Labels {
		printChange(w, "Label "+f.Field, f)
	}
	for _, f := range cfg.Identity {
		if f.Old != nil && f.New != nil && *f.Old == *f.New {
			fmt.Fprintf(w, "    Label %s  %s, the same\n", f.Field, printable(*f.New))
		}
	}
	if c := cfg.Created; c != nil && c.Old != nil && c.New != nil {
		fmt.Fprintf(w, "  created  %s, was %s (as the images say themselves)\n", stamp(*c.New), stamp(*c.Old))
	}
	if cfg.FirstStep != "" {
		fmt.Fprintf(w, "  history  %d steps, were %d; the first that differs: %.200s\n", cfg.History.New, cfg.History.Old, printable(cfg.FirstStep))
	}
}

func printChange(w io.Writer, what string, f diff.FieldChange) {
	if f.Old != nil {
		fmt.Fprintf(w, "  - %s\n", strings.TrimSpace(printable(what)+"  "+printable(*f.Old)))
	}
	if f.New != nil {
		fmt.Fprintf(w, "  + %s\n", strings.TrimSpace(printable(what)+"  "+printable(*f.New)))
	}
}

func delta(n int64) string {
	switch {
	case n > 0:
		return human(n) + " larger"
	case n < 0:
		return human(-n) + " smaller"
	}
	return "of the same size"
}
