`define OK 12
`timescale 1 ps/1 ps
module reference_module (input [3:0] a, output [3:0] q);
	assign q = a + 1;
endmodule
module stimulus_gen (input clk, output logic [3:0] a);
	initial begin
		repeat(20) @(posedge clk, negedge clk) a <= $random;
		#1 $finish;
	end
endmodule
module tb();
	typedef struct packed { int errors; int clocks; } stats;
	stats stats1;
	reg clk=0;
	initial forever #5 clk = ~clk;
	logic [3:0] a;
	logic [3:0] q_ref;
	logic [3:0] q_dut;
	wire tb_match;
	stimulus_gen stim1 ( .clk, .a );
	reference_module good1 ( .a, .q(q_ref) );
	top_module top_module1 ( .a, .q(q_dut) );
	final begin
		$display("Mismatches: %1d in %1d samples", stats1.errors, stats1.clocks);
	end
	assign tb_match = ( q_ref === ( q_ref ^ q_dut ^ q_ref ) );
	always @(posedge clk, negedge clk) begin
		stats1.clocks++;
		if (!tb_match) stats1.errors++;
	end
endmodule
