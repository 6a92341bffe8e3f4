package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"tidemark/proxy/admin"
)

func newWarm() *cobra.Command {
	var files, platforms []string
	c := &cobra.Command{
		Use:   "warm REF...",
		Short: "Have images here ahead of time, and tell whether they are complete",
		Long: `Have the server fetch images ahead of time, with what refers to them, such as
signatures. It ends with a report of what is complete, and exit code 1 if anything is
missing. What was fetched when it is interrupted stays: the next time goes on.

Files that name images are lists with one a line, compose files, or Kubernetes
manifests.`,
		Example: `  tidemark warm nginx:1.27 ghcr.io/org/app:v1
  tidemark warm -f compose.yaml --platform linux/amd64
  kubectl get pods -A -o yaml | tidemark warm -f -`,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringArrayVarP(&files, "file", "f", nil, "file that names images: a list, a compose file or Kubernetes manifests; - is standard input")
	c.Flags().StringSliceVar(&platforms, "platform", nil, "only the images of this platform, such as linux/amd64; several with commas")
	c.RunE = func(c *cobra.Command, args []string) error {
		refs, err := namedImages(c, args, files)
		if err != nil {
			return err
		}
		w, err := cl.warm(c, admin.WarmRequest{Refs: refs, Platforms: platforms})
		if err != nil {
			return err
		}
		if *asJSON {
			if err := printJSON(c, w.report); err != nil {
				return err
			}
		} else if err := printWarm(c.OutOrStdout(), w); err != nil {
			return err
		}
		if !w.report.Complete {
			return fmt.Errorf("%d of %d images are not complete", len(w.report.Failed), len(refs))
		}
		return nil
	}
	return c
}

// A warming is what the server said of its images, and in the end.
type warming struct {
	images []admin.WarmProgress
	report admin.WarmReport
}

// warm has the server warm images, and shows how far it is.
func (cl *client) warm(c *cobra.Command, q admin.WarmRequest) (w warming, err error) {
	bars := newProgress(c.ErrOrStderr())
	defer bars.Close()
	here := 0 // images that are complete
	err = cl.postLines(c.Context(), "/api/v1/warm", q, func(line []byte) error {
		if json.Unmarshal(line, &w.report) == nil && w.report.Failed != nil {
			return nil // the last line, which has what no other has
		}
		w.report = admin.WarmReport{}
		var p admin.WarmProgress
		if err := json.Unmarshal(line, &p); err != nil {
			return err
		}
		if !p.Done {
			bars.update(p.Ref, p.Have, p.Total)
			return nil
		}
		w.images = append(w.images, p)
		if p.Error != "" {
			bars.fail(p.Ref, p.Error)
			return nil
		}
		here++
		bars.end(p.Ref, "fetched "+human(p.Bytes))
		return nil
	})
	if c.Context().Err() != nil {
		err = fmt.Errorf("interrupted: %d of %d images are here whole; what was fetched of the others stays, and running it again goes on from there", here, len(q.Refs))
	}
	return w, err
}

func printWarm(out io.Writer, warmed warming) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "REF\tDIGEST\tPLATFORM\tHERE\tMISSING")
	for _, im := range warmed.images {
		for _, p := range im.Platforms {
			printRow(w, im.Ref, im.Digest, p)
		}
		if im.Error != "" {
			fmt.Fprintf(w, "%s\t%s\t-\t-\t%s\n", im.Ref, orNothing(short(im.Digest)), printable(im.Error))
		}
	}
	fmt.Fprintf(w, "\nfetched %s in %d pieces\n", human(warmed.report.Bytes), warmed.report.Filled)
	return w.Flush()
}

// postLines calls the API with in, and hands each line of the answer to take. An answer
// that ends with an error, or in the middle, is an error.
func (cl *client) postLines(ctx context.Context, path string, in any, take func(line []byte) error) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	resp, err := cl.open(ctx, http.MethodPost, strings.TrimSuffix(cl.server, "/")+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxAnswer)
	done := false
	for lines.Scan() {
		var end struct {
			Done  *bool           `json:"done"`
			Ref   *string         `json:"ref"` // a line about one of several
			Error json.RawMessage `json:"error"`
		}
		if err := json.Unmarshal(lines.Bytes(), &end); err != nil {
			if done = false; !lines.Scan() {
				break // the last one is cut off
			}
			return fmt.Errorf("%s%s: %w", cl.server, path, err)
		}
		var e admin.Error
		if end.Ref == nil && end.Error != nil && json.Unmarshal(end.Error, &e) == nil {
			return &refusedError{cl.server, e.Code, e.Message}
		}
		done = end.Ref == nil && end.Done != nil && *end.Done
		if err := take(lines.Bytes()); err != nil {
			return fmt.Errorf("%s%s: %w", cl.server, path, err)
		}
	}
	if err := lines.Err(); err != nil || !done {
		return errors.Join(fmt.Errorf("%s%s: the answer ended in the middle; the server stopped, or its log says why: what was done stays, call it again", cl.server, path), err)
	}
	return nil
}
