package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"tidemark/audit"
	"tidemark/proxy/admin"
)

func newLog() *cobra.Command {
	var kind, sinceFlag string
	var most int
	c := &cobra.Command{
		Use:   "log [REF]",
		Short: "Show what happened to tags, newest first",
		Long: `Show the events of the ledger, newest first: of all tags, or of REF.

The time of a change is an interval: upstream changed the tag after the last
answer that confirmed the old digest, and before the first that told the new one.`,
		Example: `  tidemark log nginx:1.27
  tidemark log --type tag.moved --since 7d`,
		Args: cobra.MaximumNArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVar(&kind, "type", "", "only events of this type, such as tag.moved")
	c.Flags().StringVar(&sinceFlag, "since", "", "only events of this time, such as 24h or 30d, or since this date")
	c.Flags().IntVarP(&most, "max-count", "n", 0, "at most this many events")
	c.RunE = func(c *cobra.Command, args []string) error {
		q := url.Values{"order": {"desc"}, "limit": {"1000"}}
		if len(args) > 0 {
			ref, err := expandRef(args[0])
			if err != nil {
				return err
			}
			q.Set("ref", ref.String())
		}
		if kind != "" {
			q.Set("type", kind)
		}
		if sinceFlag != "" {
			t, err := ago(sinceFlag, time.Now())
			if err != nil {
				return err
			}
			q.Set("since", t)
		}
		if most < 0 {
			return usage(fmt.Errorf("-n %d: want how many events", most))
		}
		all := admin.EventList{Events: []admin.Event{}}
		for {
			var page admin.EventList
			if err := cl.getJSON(c.Context(), "/api/v1/events", q, &page); err != nil {
				return err
			}
			all.Events = append(all.Events, page.Events...)
			if page.Next == nil || most > 0 && len(all.Events) >= most {
				break
			}
			q.Set("after", strconv.FormatInt(*page.Next, 10))
		}
		if most > 0 && len(all.Events) > most {
			all.Events = all.Events[:most]
		}
		if *asJSON {
			return printJSON(c, all)
		}
		for i, e := range all.Events {
			if i > 0 {
				fmt.Fprintln(c.OutOrStdout())
			}
			if err := printEvent(c.OutOrStdout(), e); err != nil {
				return err
			}
		}
		return nil
	}
	return c
}

// printEvent writes an event the way git writes a commit.
func printEvent(w io.Writer, item admin.Event) error {
	e, err := audit.ParseLeaf(item.Leaf)
	if err != nil {
		return fmt.Errorf("event %d: %w", item.Index, err)
	}
	fmt.Fprintf(w, "event %d  %s  %s\n", item.Index, e.Type, e.Ref)
	if e.Old != nil {
		fmt.Fprintf(w, "  old      %s\n", e.Old.Digest)
	}
	if e.New != nil {
		fmt.Fprintf(w, "  new      %s\n", e.New.Digest)
	}
	if e.Interval != nil {
		if e.Interval.NotBefore != nil {
			fmt.Fprintf(w, "  between  %s and %s\n", stamp(*e.Interval.NotBefore), stamp(e.Interval.NotAfter))
		} else {
			fmt.Fprintf(w, "  at       %s\n", stamp(e.Interval.NotAfter))
		}
	}
	if e.RevertsEvent != nil {
		fmt.Fprintf(w, "  reverts  event %s\n", e.RevertsEvent)
	}
	fmt.Fprintf(w, "  policy   %s, %s\n", e.Policy.Mode, e.Policy.Effect)
	return nil
}

// stamp is a time to the millisecond, as the ledger has it.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05.000 UTC") }

func newShow() *cobra.Command {
	c := &cobra.Command{
		Use:     "show INDEX",
		Short:   "Show one event whole, as it was sealed",
		Example: "  tidemark show 12",
		Args:    cobra.ExactArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		index, err := strconv.ParseInt(args[0], 10, 64)
		if err != nil || index < 0 {
			return usage(fmt.Errorf("%q is not the index of an event", args[0]))
		}
		var e admin.Event
		if err := cl.getJSON(c.Context(), "/api/v1/events/"+strconv.FormatInt(index, 10), nil, &e); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, e)
		}
		if err := printEvent(c.OutOrStdout(), e); err != nil {
			return err
		}
		leaf, err := json.MarshalIndent(e.Leaf, "  ", "  ")
		if err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "\n  %s\n", leaf)
		return nil
	}
	return c
}
