package main

import (
	"context"
	"fmt"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tidemark/proxy/admin"
)

func newTags() *cobra.Command {
	var movedSince string
	var held bool
	c := &cobra.Command{
		Use:   "tags [PATTERN]",
		Short: "List known tags: what they mean, since when, and when that was confirmed",
		Long: `List known tags: what they mean, since when, and when that was last confirmed.

PATTERN is an image reference, whose tags are listed, or a pattern in which ?
and * stand for characters within a component and ** for any.`,
		Example: `  tidemark tags nginx
  tidemark tags 'docker.io/library/*:latest'
  tidemark tags --held
  tidemark tags --moved-since 24h`,
		Args: cobra.MaximumNArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().BoolVar(&held, "held", false, "only tags of which something is held back")
	c.Flags().StringVar(&movedSince, "moved-since", "", "only tags that moved in this time, such as 24h or 30d, or since this date")
	c.RunE = func(c *cobra.Command, args []string) error {
		q := url.Values{}
		if len(args) > 0 {
			p, err := expandPattern(args[0])
			if err != nil {
				return err
			}
			q.Set("match", p)
		}
		if held {
			q.Set("held", "true")
		}
		if movedSince != "" {
			t, err := ago(movedSince, time.Now())
			if err != nil {
				return err
			}
			q.Set("moved_since", t)
		}
		tags, err := cl.tags(c.Context(), q)
		if err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, admin.TagList{Tags: tags})
		}
		if len(tags) == 0 {
			fmt.Fprintln(c.ErrOrStderr(), "tidemark: no tag that is known here is like that")
			return nil
		}
		w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "REF\tSERVES\tUPSTREAM\tSINCE\tCONFIRMED\tMODE\tHELD")
		now := time.Now()
		for _, t := range tags {
			upstream, why := "the same", "-"
			if t.Head != t.Served {
				upstream = short(t.Head)
			}
			if t.Deleted != nil {
				upstream = "deleted"
			}
			if t.Held != nil {
				why = heldFor(*t.Held, now)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", t.Ref, orNothing(short(t.Served)), upstream, since(t.HeadSince, now), since(t.LastConfirmed, now), t.Mode, why)
		}
		return w.Flush()
	}
	return c
}

// tags are all that q selects, page by page.
func (cl *client) tags(ctx context.Context, q url.Values) ([]admin.Tag, error) {
	all := []admin.Tag{}
	q.Set("limit", "1000")
	for {
		var page admin.TagList
		if err := cl.getJSON(ctx, "/api/v1/tags", q, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Tags...)
		if page.Next == "" {
			return all, nil
		}
		q.Set("after", page.Next)
	}
}
