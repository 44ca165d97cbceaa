package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
)

// An Agent is a process on a node that makes and answers traffic. The process
// starts with the first request. All methods may be called by several
// goroutines; ending the context of a request ends the request.
//
// An agent ends with its lab's process, however that dies: it reads requests
// from a pipe and stops where the pipe does.
type Agent struct {
	node *Node

	// writing guards stdin. It is not mu, which whoever reads the answers needs:
	// the process may take no request before an answer of its has been read.
	writing sync.Mutex
	stdin   io.WriteCloser

	mu      sync.Mutex
	cmd     *exec.Cmd              // guarded by mu; nil before the first request
	pending map[uint64]chan answer // guarded by mu
	last    uint64                 // guarded by mu; id of the last request
	killed  bool                   // guarded by mu
	err     error                  // guarded by mu; why the process ended
	done    chan struct{}          // closed when the process has ended
}

// A request is one line to the agent. The id also names what the request opens
// (listeners, flows, a capture), until a request closes it.
type request struct {
	ID   uint64          `json:"id"`
	Op   string          `json:"op"`
	Args json.RawMessage `json:"args,omitempty"`
}

// An answer is one line from the agent.
type answer struct {
	ID     uint64          `json:"id"`
	Result json.RawMessage `json:"result,omitempty"`
	Err    string          `json:"err,omitempty"`
}

// ErrAgentEnded is returned for requests to an agent whose process is no more.
var ErrAgentEnded = errors.New("lab: the agent has ended")

// Agent returns the node's agent, a new one if the last was killed.
func (n *Node) Agent() *Agent {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.agents) == 0 {
		n.agents = append(n.agents, &Agent{node: n})
	}
	if n.agents[0].ended() {
		n.agents[0] = &Agent{node: n}
	}
	return n.agents[0]
}

// NewAgent returns an agent of its own, such as one that is going to be killed.
func (n *Node) NewAgent() *Agent {
	n.Agent() // the first place is for the shared one
	a := &Agent{node: n}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.agents = append(n.agents, a)
	return a
}

func (n *Node) killAgents() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range n.agents {
		a.Kill()
	}
}

// Kill ends the agent's process at once, the way a crash does: the kernel closes
// its sockets. It returns when the process is gone.
func (a *Agent) Kill() {
	a.mu.Lock()
	a.killed = true
	cmd := a.cmd
	a.mu.Unlock()
	if cmd == nil {
		return
	}
	_ = cmd.Process.Kill()
	<-a.done
}

func (a *Agent) ended() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.killed || a.err != nil
}

// start is called with mu held.
func (a *Agent) start() error {
	if a.cmd != nil {
		return nil
	}
	cmd := a.node.command(context.Background(), "/proc/self/exe", []string{agentArg0, a.node.NS})
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	a.cmd, a.stdin, a.pending, a.done = cmd, in, map[uint64]chan answer{}, make(chan struct{})
	go a.read(cmd, out)
	return nil
}

// read hands out the answers until the process has ended.
func (a *Agent) read(cmd *exec.Cmd, out io.Reader) {
	dec := json.NewDecoder(out)
	var err error
	for {
		var ans answer
		if err = dec.Decode(&ans); err != nil {
			break
		}
		a.mu.Lock()
		waiting := a.pending[ans.ID]
		delete(a.pending, ans.ID)
		a.mu.Unlock()
		if waiting != nil {
			waiting <- ans
		}
	}
	_ = cmd.Process.Kill() // it may have stopped talking rather than ended
	if e := cmd.Wait(); e != nil {
		err = e
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
	close(a.done)
}

// send starts a request and returns its id and the channel of its answer.
func (a *Agent) send(op string, args any) (uint64, <-chan answer, error) {
	raw, err := json.Marshal(args)
	if err != nil {
		return 0, nil, err
	}
	id, answers, err := a.expect()
	if err != nil {
		return 0, nil, err
	}
	if err := a.write(request{ID: id, Op: op, Args: raw}); err != nil {
		<-a.done // the pipe has no reader any more
		return 0, nil, ErrAgentEnded
	}
	return id, answers, nil
}

// expect begins a request, and the process if it has not begun.
func (a *Agent) expect() (uint64, <-chan answer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.killed || a.err != nil {
		return 0, nil, ErrAgentEnded
	}
	if err := a.start(); err != nil {
		return 0, nil, err
	}
	a.last++
	answers := make(chan answer, 1)
	a.pending[a.last] = answers
	return a.last, answers, nil
}

func (a *Agent) write(r request) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	a.writing.Lock()
	defer a.writing.Unlock()
	_, err = a.stdin.Write(append(line, '\n'))
	return err
}

// ask does a request and decodes its result, which may be nil for none.
func (a *Agent) ask(ctx context.Context, op string, args, result any) (id uint64, err error) {
	defer func() {
		if err != nil && !errors.Is(err, ErrAgentEnded) {
			err = fmt.Errorf("lab: %s: %s: %w", a.node.Name, op, err)
		}
	}()
	id, answers, err := a.send(op, args)
	if err != nil {
		return 0, err
	}
	select {
	case ans := <-answers:
		return id, decode(ans, result)
	case <-a.done:
		return 0, ErrAgentEnded
	case <-ctx.Done():
		_ = a.write(request{ID: id, Op: opCancel})
		return 0, ctx.Err()
	}
}

func decode(ans answer, result any) error {
	if ans.Err != "" {
		return errors.New(ans.Err)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(ans.Result, result)
}

// An opened is something an agent holds open for a request.
type opened struct {
	agent *Agent
	id    uint64
}

// handle names an opened in a request.
type handle struct {
	ID   uint64 `json:"id"`
	From int    `json:"from,omitempty"` // of a list that grows: its first entry that is wanted
}

// Close ends it. It is no error if it, or its agent, has ended before.
func (o opened) Close() error {
	_, err := o.agent.ask(context.Background(), opClose, handle{ID: o.id}, nil)
	if errors.Is(err, ErrAgentEnded) {
		return nil
	}
	return err
}
