package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"tidemark/config"
	"tidemark/proxy/admin"
)

func newCacheLs() *cobra.Command {
	var complete, incomplete, verify, pins bool
	var platforms []string
	c := &cobra.Command{
		Use:   "ls [PATTERN]",
		Short: "List images, whether all of their bytes are here, and what is missing",
		Long: `List what every known tag means, for each platform whether all of its bytes are
here, and what is missing. With --verify what is here is read and compared with its
digest first. With --pins it lists what is kept instead, and why.`,
		Example: `  tidemark cache ls --complete --platform linux/amd64
  tidemark cache ls 'docker.io/library/*' --incomplete
  tidemark cache ls --pins`,
		Args: cobra.MaximumNArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().BoolVar(&complete, "complete", false, "only images of which every platform is complete")
	c.Flags().BoolVar(&incomplete, "incomplete", false, "only images of which something is missing")
	c.Flags().StringSliceVar(&platforms, "platform", nil, "look only at this platform, such as linux/amd64; several with commas")
	c.Flags().BoolVar(&verify, "verify", false, "read what is here and compare it with its digest")
	c.Flags().BoolVar(&pins, "pins", false, "list what is kept, and why")
	c.RunE = func(c *cobra.Command, args []string) error {
		if complete && incomplete || pins && (complete || incomplete || verify || platforms != nil || len(args) > 0) {
			return usage(errors.New("--complete, --incomplete and --pins exclude each other, and --pins goes with --json only"))
		}
		if pins {
			return cl.listPins(c, *asJSON)
		}
		q := url.Values{"platform": platforms}
		if len(args) > 0 {
			p, err := expandPattern(args[0])
			if err != nil {
				return err
			}
			q.Set("match", p)
		}
		if complete || incomplete {
			q.Set("complete", fmt.Sprint(complete))
		}
		if verify {
			q.Set("verify", "true")
		}
		images, err := cl.images(c, q)
		if err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, admin.ImageList{Images: images})
		}
		return printImages(c.OutOrStdout(), images)
	}
	return c
}

// images are all that q selects, page by page. Images that are read take their time:
// each is a page of its own.
func (cl *client) images(c *cobra.Command, q url.Values) ([]admin.Image, error) {
	q.Set("limit", "1000")
	if q.Has("verify") {
		q.Set("limit", "1")
	}
	all := []admin.Image{}
	for {
		var page admin.ImageList
		resp, err := cl.open(c.Context(), http.MethodGet, strings.TrimSuffix(cl.server, "/")+"/api/v1/cache/images?"+q.Encode(), nil)
		if err != nil {
			return nil, err
		}
		err = json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&page)
		if err = errors.Join(err, resp.Body.Close()); err != nil {
			return nil, err
		}
		if all = append(all, page.Images...); page.Next == "" {
			return all, nil
		}
		q.Set("after", page.Next)
	}
}

func printImages(out io.Writer, images []admin.Image) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "REF\tDIGEST\tPLATFORM\tHERE\tMISSING")
	for _, im := range images {
		if len(im.Platforms) == 0 {
			fmt.Fprintf(w, "%s\t%s\t-\t-\tno image of such a platform\n", im.Ref, orNothing(short(im.Digest)))
		}
		for _, p := range im.Platforms {
			printRow(w, im.Ref, im.Digest, p)
		}
	}
	return w.Flush()
}

// printRow prints the row of one platform of an image.
func printRow(w io.Writer, ref string, d digest.Digest, p admin.Platform) {
	name := p.Platform
	if name == "" {
		name = "?"
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", ref, short(d), printable(name), human(p.Bytes), missingText(p))
}

// missingText is what an image lacks, in a few words.
func missingText(p admin.Platform) string {
	if p.Complete {
		return "nothing"
	}
	size, unknown := int64(0), ""
	for _, m := range p.Missing {
		if m.Size < 0 {
			unknown = " at least"
		}
		size += max(0, m.Size)
	}
	return fmt.Sprintf("%d pieces,%s %s", len(p.Missing), unknown, human(size))
}

func (cl *client) listPins(c *cobra.Command, asJSON bool) error {
	q := url.Values{"limit": {"1000"}}
	all := []admin.Pin{}
	for {
		var page admin.PinList
		if err := cl.getJSON(c.Context(), "/api/v1/cache/pins", q, &page); err != nil {
			return err
		}
		if all = append(all, page.Pins...); page.Next == "" {
			break
		}
		q.Set("after", page.Next)
	}
	if asJSON {
		return printJSON(c, admin.PinList{Pins: all})
	}
	w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DIGEST\tREASON\tFOR\tPLATFORMS\tKEPT\tHERE\tNOTE")
	for _, p := range all {
		kept, here, platforms := "while there is room", "yes", "all"
		if p.Firm {
			kept = "always"
		}
		if !p.Here {
			here = "no"
		}
		if len(p.Platforms) > 0 {
			platforms = strings.Join(p.Platforms, " ")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", short(p.Digest), p.Reason, orNothing(p.For), platforms, kept, here, printable(p.Note))
	}
	return w.Flush()
}

func newCachePin() *cobra.Command {
	return newTouch("pin", "pin REF|DIGEST", "Keep an image, whatever else has to go", `Keep what a tag means, with everything that it refers to, whatever else has to go: as
the tag moves, the pin follows it. Or keep one digest. It is an error if what is
pinned would be more than the cache may have.`,
		"  tidemark cache pin alpine:3.22 --platform linux/amd64 --reason 'the base of everything'", true, func(w io.Writer, t admin.Touched) {
			fmt.Fprintf(w, "pinned, %s in %d pieces are here\n", human(t.Bytes), len(t.Digests))
			if len(t.Missing) > 0 {
				fmt.Fprintf(w, "%d pieces are not: tidemark warm fetches them\n", len(t.Missing))
			}
		})
}

func newCacheUnpin() *cobra.Command {
	return newTouch("unpin", "unpin REF|DIGEST", "Take back a pin", `Take back a pin, and what a bundle that was imported pinned of it. What holds and
history keep they go on keeping.`,
		"  tidemark cache unpin alpine:3.22", false, func(w io.Writer, t admin.Touched) {
			fmt.Fprintf(w, "no longer pinned, %s may go when there is need\n", human(t.Bytes))
		})
}

func newCacheRm() *cobra.Command {
	return newTouch("remove", "rm REF|DIGEST", "Take an image out of the cache", `Take what a tag means out of the cache, or one digest with what it refers to. What
other tags need stays, and so does what is pinned. The next pull fetches it again.`,
		"  tidemark cache rm ghcr.io/org/app:v1 --reason 'pushed by mistake'", true, func(w io.Writer, t admin.Touched) {
			fmt.Fprintf(w, "removed %s in %d pieces\n", human(t.Bytes), len(t.Digests))
			if len(t.Kept) > 0 {
				fmt.Fprintf(w, "%d pieces stay: others need them, or they are pinned\n", len(t.Kept))
			}
		})
}

func newTouch(call, use, short, long, example string, platformed bool, show func(io.Writer, admin.Touched)) *cobra.Command {
	t := admin.Target{}
	c := &cobra.Command{Use: use, Short: short, Long: long, Example: example, Args: cobra.ExactArgs(1)}
	cl, asJSON := addClient(c), addJSON(c)
	if platformed {
		c.Flags().StringSliceVar(&t.Platforms, "platform", nil, "only the images of this platform, such as linux/amd64; several with commas")
		c.Flags().StringVar(&t.Reason, "reason", "", "why; it is recorded")
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		t.Target = args[0]
		if _, err := digest.Parse(args[0]); err != nil {
			ref, err := expandRef(args[0])
			if err != nil {
				return err
			}
			t.Target = ref.String()
		}
		var out admin.Touched
		if err := cl.postJSON(c.Context(), "/api/v1/cache/"+call, t, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		show(c.OutOrStdout(), out)
		return nil
	}
	return c
}

func newCacheScrub() *cobra.Command {
	var rate string
	c := &cobra.Command{
		Use:   "scrub",
		Short: "Read everything that is stored and compare it with its digest",
		Long: `Read everything that is stored and compare it with its digest, no faster than
cache.scrub.rate. What is wrong is removed and, if somebody is known who has it,
fetched again; it is recorded. Exit code 3 if anything was wrong.

The server does the same by itself, as often as cache.scrub.every says.`,
		Example: "  tidemark cache scrub --rate 500MiB",
		Args:    cobra.NoArgs,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVar(&rate, "rate", "", "bytes to read a second, such as 500MiB; cache.scrub.rate by default")
	c.RunE = func(c *cobra.Command, _ []string) error {
		in := map[string]int64{}
		if rate != "" {
			size, err := config.ParseSize(rate)
			if err != nil || size.Bytes <= 0 {
				return usage(fmt.Errorf("--rate %q is no size such as 500MiB", rate))
			}
			in["rate"] = size.Bytes
		}
		bar := newTransfer(c.ErrOrStderr(), "scrub", 0)
		defer bar.Close()
		var report admin.ScrubReport
		err := cl.postLines(c.Context(), "/api/v1/cache/scrub", in, func(line []byte) error {
			var p admin.ScrubProgress
			if err := json.Unmarshal(line, &report); err != nil || report.Done {
				return err
			}
			if err := json.Unmarshal(line, &p); err != nil {
				return err
			}
			bar.Update(p.Bytes, p.Total)
			return nil
		})
		if err != nil {
			return err
		}
		bar.Close()
		if *asJSON {
			if err := printJSON(c, report); err != nil {
				return err
			}
		} else {
			printScrub(c.OutOrStdout(), report)
		}
		if n := len(report.Wrong); n > 0 {
			return &exitError{exitWrong, fmt.Errorf("%d pieces of content were not what their digests say", n)}
		}
		return nil
	}
	return c
}

func printScrub(w io.Writer, r admin.ScrubReport) {
	for _, f := range r.Wrong {
		fmt.Fprintf(w, "%s  %s  %s\n", f.Digest, f.Action, printable(f.Error))
	}
	fmt.Fprintf(w, "checked %s in %d pieces, %d were wrong\n", human(r.Bytes), r.Checked, len(r.Wrong))
}
