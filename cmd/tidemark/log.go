package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tidemark/audit"
	"tidemark/proxy/admin"
)

func newLog() *cobra.Command {
	var kind, sinceFlag string
	var most int
	var follow bool
	c := &cobra.Command{
		Use:   "log [REF]",
		Short: "Show what happened to tags, newest first",
		Long: `Show the events of the ledger, newest first: of all tags, or of REF.

The time of a change is an interval: upstream changed the tag after the last
answer that confirmed the old digest, and before the first that told the new one.

With --follow each event is one line as it is recorded: when, how severe, which. On a
terminal the colours tell the severity (NO_COLOR turns them off).`,
		Example: `  tidemark log nginx:1.27
  tidemark log --type tag.moved --since 7d
  tidemark log --follow`,
		Args: cobra.MaximumNArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVar(&kind, "type", "", "only events of this type, such as tag.moved")
	c.Flags().StringVar(&sinceFlag, "since", "", "only events of this time, such as 24h or 30d, or since this date")
	c.Flags().BoolVar(&follow, "follow", false, "wait for events and show them as they are recorded, oldest first")
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
		if follow {
			if sinceFlag != "" || most > 0 {
				return usage(errors.New("--follow shows what is recorded from now on: --since and -n do not go with it"))
			}
			return cl.follow(c, q, *asJSON)
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
		if len(all.Events) == 0 {
			fmt.Fprintln(c.ErrOrStderr(), "tidemark: no event is like that")
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
	c.AddCommand(newFork())
	return c
}

// follow prints events as they are recorded. When the server goes away it comes
// back to where it was.
func (cl *client) follow(c *cobra.Command, q url.Values, asJSON bool) error {
	q.Del("order")
	q.Del("limit")
	var s admin.Status
	if err := cl.getJSON(c.Context(), "/api/v1/status", nil, &s); err != nil {
		return err
	}
	shown := s.Log.Size - 1 // from now on, also if the server goes away at once
	told, names := "", &shortener{}
	for {
		q.Set("after", strconv.FormatInt(shown, 10))
		err := cl.stream(c, q, func(e admin.Event, line string) error {
			shown = e.Index
			if asJSON {
				_, err := fmt.Fprintln(c.OutOrStdout(), line)
				return err
			}
			leaf, err := audit.ParseLeaf(e.Leaf)
			if err != nil {
				return fmt.Errorf("event %d: %w", e.Index, err)
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), paint(colourful(c.OutOrStdout()), leaf.Severity(), names.line(e.Index, leaf)))
			return err
		})
		if c.Context().Err() != nil {
			return nil
		}
		if cl.getJSON(c.Context(), "/api/v1/status", nil, &s) == nil && s.Log.Size-1 < shown {
			return &exitError{exitWrong, fmt.Errorf("the log was taken back: it has %d entries, and entry %d was shown", s.Log.Size, shown)}
		}
		if err != nil && err.Error() != told {
			told = err.Error()
			fmt.Fprintln(c.ErrOrStderr(), "tidemark: trying again:", told)
		}
		select {
		case <-time.After(followRetry):
		case <-c.Context().Done():
			return nil
		}
	}
}

const followRetry = 2 * time.Second

// stream reads Server-Sent Events until they end, and has each shown, with the line that
// it came in.
func (cl *client) stream(c *cobra.Command, q url.Values, show func(e admin.Event, line string) error) error {
	resp, err := cl.open(c.Context(), http.MethodGet, strings.TrimSuffix(cl.server, "/")+"/api/v1/events/stream?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		var e admin.Event
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			return err
		}
		if err := show(e, data); err != nil {
			return err
		}
	}
	return lines.Err()
}

// printEvent writes an event the way git writes a commit.
func printEvent(w io.Writer, item admin.Event) error {
	e, err := audit.ParseLeaf(item.Leaf)
	if err != nil {
		return fmt.Errorf("event %d: %w", item.Index, err)
	}
	line := func(what, format string, args ...any) {
		fmt.Fprintf(w, "  %-8s %s\n", what, printable(fmt.Sprintf(format, args...)))
	}
	head := fmt.Sprintf("event %d  %s", item.Index, e.Type)
	if e.Ref != (audit.Ref{}) {
		head += "  " + e.Ref.String()
	}
	fmt.Fprintln(w, paint(colourful(w), e.Severity(), head))
	said := since(e.Time, time.Now())
	if e.Old != nil {
		line("old", "%s", e.Old.Digest)
	}
	if e.New != nil {
		line("new", "%s", e.New.Digest)
	}
	switch {
	case e.Interval != nil && e.Interval.NotBefore != nil:
		line("between", "%s and %s (%s)", stamp(*e.Interval.NotBefore), stamp(e.Interval.NotAfter), said)
	case e.Interval != nil:
		line("at", "%s (%s)", stamp(e.Interval.NotAfter), said)
	case e.Gap != nil:
		line("blind", "from %s to %s: %s", stamp(e.Gap.Start), stamp(e.Gap.End), e.Gap.Cause)
	default:
		line("at", "%s (%s)", stamp(e.Time), said)
	}
	if e.Evidence.Trigger == "push" {
		line("pushed", "through this server")
	}
	if e.RevertsEvent != nil {
		line("reverts", "event %s", e.RevertsEvent)
	}
	if e.Amends != nil {
		line("amends", "event %s", e.Amends)
	}
	if e.Class != "" && e.Class != audit.ClassUnknown {
		line("class", "%s", e.Class)
	}
	if len(e.Signals) > 0 {
		line("signals", "%s", strings.Join(e.Signals, ", "))
	}
	if e.Reason != "" {
		line("because", "%s", e.Reason)
	}
	if op := e.Operator; op != nil {
		line("operator", "%s", strings.TrimSpace(op.Action+" "+op.Target))
		switch op.Action {
		case "import":
			line("bundle", "%s", op.Digest)
			line("of", "%s entries", op.New)
		case "backfill":
			line("by", "the word of upstream's %s, %s stretches", op.Old, op.New)
		case "scrub":
			line("wrong", "%s, %s", op.Digest, op.New)
		case "pin", "unpin", "purge":
			if op.Digest != "" {
				line("digest", "%s", op.Digest)
			}
		default:
			if op.Old != "" || op.New != "" {
				line("from", "%s", orNothing(op.Old))
				line("to", "%s", orNothing(op.New))
			}
		}
		if op.Reason != "" {
			line("reason", "%s", op.Reason)
		}
	}
	if f := e.Flap; f != nil {
		line("flap", "%s, %d changes since %s", f.State, f.Changes, stamp(f.Since))
	}
	if s := e.Snapshot; s != nil {
		line("commits", "%s, %d refs", s.Digest, s.Refs)
	}
	if f := e.Fork; f != nil {
		line("was", "%s of %d entries", f.OldOrigin, f.OldSize)
		line("is", "%s from %d entries on", f.NewOrigin, f.Size)
	}
	if e.Policy.Mode != "" {
		rule := ""
		if e.Policy.Rule != "" {
			rule = ", rule " + e.Policy.Rule
		}
		line("policy", "%s%s", strings.TrimSuffix(string(e.Policy.Mode)+", "+e.Policy.Effect, ", "), rule)
	}
	if e.Policy.Until != nil {
		line("until", "%s", stamp(*e.Policy.Until))
	}
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
		index, err := parseIndex(args[0])
		if err != nil {
			return err
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
