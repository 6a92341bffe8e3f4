package main

import (
	"bytes"
	"context"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tidemark/audit"
	"tidemark/proxy/admin"
)

func newTags() *cobra.Command {
	var movedSince string
	var held bool
	c := &cobra.Command{
		Use:   "tags [PATTERN]",
		Short: "List known tags: what they mean, since when, and when that was confirmed",
		Long: `List known tags: what they mean, since when, and when that was last confirmed. With
--moved-since it tells how the tags moved, the last first.

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
		if movedSince != "" {
			return cl.printMoved(c, tags, q.Get("moved_since"))
		}
		names := &shortener{}
		for _, t := range tags {
			names.see(t.Head, t.Served)
		}
		w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "REF\tSERVES\tUPSTREAM\tSINCE\tCONFIRMED\tMODE\tHELD")
		now := time.Now()
		for _, t := range tags {
			upstream, why := "the same", "-"
			if t.Head != t.Served {
				upstream = names.short(t.Head)
			}
			if t.Deleted != nil {
				upstream = "deleted"
			}
			if t.Held != nil {
				why = heldFor(*t.Held, now)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", t.Ref, names.short(t.Served), upstream, since(t.HeadSince, now), since(t.LastConfirmed, now), t.Mode, why)
		}
		return w.Flush()
	}
	return c
}

// printMoved tells of tags that moved since a time how they did, the newest first.
func (cl *client) printMoved(c *cobra.Command, tags []admin.Tag, from string) error {
	moves, err := cl.lastMoves(c.Context(), from)
	if err != nil {
		return err
	}
	slices.SortStableFunc(tags, func(a, b admin.Tag) int { return b.HeadSince.Compare(a.HeadSince) })
	names := &shortener{}
	for _, t := range tags {
		names.see(append(digestsOf(moves[t.Ref]), t.Head, t.Served)...)
	}
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "MOVED\tREF\tFROM\tTO\tCLASS\tSERVES\tMODE\tSIGNALS")
	now := time.Now()
	for _, t := range tags {
		e := moves[t.Ref]
		old, class, serves, signals := "-", string(e.Class), "the same", "-"
		if e.Old != nil {
			old = names.short(e.Old.Digest)
		}
		if t.Head != t.Served {
			serves = names.short(t.Served)
		}
		if len(e.Signals) > 0 {
			signals = strings.Join(e.Signals, " ")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", since(t.HeadSince, now), t.Ref, old, names.short(t.Head), orNothing(class), serves, t.Mode, printable(signals))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	on := colourful(c.OutOrStdout())
	for i, line := range strings.Split(strings.TrimRight(table.String(), "\n"), "\n") {
		if i > 0 {
			line = paint(on, moves[tags[i-1].Ref].Severity(), line)
		}
		fmt.Fprintln(c.OutOrStdout(), line)
	}
	return nil
}

// lastMoves are the last moves of refs since a time, by ref.
func (cl *client) lastMoves(ctx context.Context, since string) (map[string]audit.Event, error) {
	out := make(map[string]audit.Event)
	q := url.Values{"since": {since}, "limit": {"1000"}}
	for {
		var page admin.EventList
		if err := cl.getJSON(ctx, "/api/v1/events", q, &page); err != nil {
			return nil, err
		}
		for _, item := range page.Events {
			e, err := audit.ParseLeaf(item.Leaf)
			if err != nil {
				return nil, fmt.Errorf("event %d: %w", item.Index, err)
			}
			if e.Type.Moves() {
				out[e.Ref.String()] = e
			}
		}
		if page.Next == nil {
			return out, nil
		}
		q.Set("after", strconv.FormatInt(*page.Next, 10))
	}
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
